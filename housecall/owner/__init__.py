"""What an owner decides and keeps: her key, policies, answers and ledger. No torch, no session, no value."""
