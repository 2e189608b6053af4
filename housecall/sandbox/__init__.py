"""What the process that computes for strangers is refused by its own kernel. Knows nothing of what it computes.

The other guards of a worker are promises of this package's code: the closed table of operators, the codec, the one
door out. The sandbox is for the day on which one of them is broken, or a kernel of torch is: whoever then runs code
of theirs in the worker finds a process without secrets, that can start no program, read no file but its own and the
libraries', and reach nobody.

    limits        no core dumps; bounds on files, open files, threads, memory (RLIMIT)
    environment   variables beyond a short list gone, umask 077, no terminal, no inherited files
    privileges    no capabilities, none to be had (no_new_privs), not readable by a debugger
    system calls  programs, tracing, mounts, modules, keys, namespaces ... refused (seccomp-bpf)
    files         all but the worker's folder and the libraries refused (Landlock)
    network       no connections but to the authority (seccomp-bpf, Landlock)

Each is in force or is not, is reported with the reason, and is a warning in the log if it is missing: a `Report`.

NOTE [What remains]
One process listens, holds the keys and computes, so there are things that no kernel can keep from it. Code that runs
in it can
- read all that the worker reads: its TLS key, every data set of its folder, the values of every session;
- write what the worker writes: its folder, and with it worker.toml, policies and the ledger's file (rules are made for
  whole trees of files, and status.json lies in the same folder). Signatures and countersigned heads show that later;
- send data to a client that is connected to it, and, while an authority is set, to that port of any host, and by
  DNS, if the authority is given by name;
- learn that a file exists, its size and times: Landlock does not hide names;
- use as much memory as `memory_mb` says, and all cores. The cgroup of a service manager bounds both.
The list of refused system calls is a list of refusals: a new call of a newer kernel is not on it, and torch makes and
runs machine code, so memory may be writable and executable.
The next step is a process for each session (no keys, no network namespace but an empty one, an executor that sees its
own data sets only) behind one that listens; a worker in a container or a virtual machine has much of that today. A
network namespace is of no use to the one process: it must listen in the one where its clients are.
"""
