"""Who somebody is: a small certificate authority, the identities it hands out, and how they end."""
