"""Training of one group of runs by several processes.

Why ours and not only torch's: a process that waits must still heed signals (Ctrl-C, SLURM's warning
before a job ends) and must notice that another process has died. torch's collectives wait without
either, so every exchange here is started asynchronously and polled.

Files:

    process_group   a process's rank, and its exchanges with the others; what losses must know about
                    a batch that several ranks share
    launcher        starts or joins the processes: on this machine, or as the tasks of a SLURM job;
                    the folder in which they meet
    worker          the program of every process but the first

**Roles.** Rank 0 is the leader: the command that the user gave. It holds the locks of the runs,
decides what is trained, prints, and writes the records. The other ranks are workers. The processes
start for the first group and train all groups of the command:

    leader                                        worker
    launcher.open_processes(runtime)
    processes.ranks  ── starts, or joins ──►      worker.main: joins through the same FileStore
    fit_group: broadcast_json(group_message) ──►  resolves the runs anew; signatures must be equal
    fit_on_process  ◄──── exchanges ────►         fit_on_process
    processes.end: broadcast_json(None) ───────►  ends

**Rendezvous.** The ranks meet through a `FileStore` in a folder with mode 0700: a temporary folder
on one machine, and ``sweeps/<sweep>/slurm/.ranks-<job>-<step>-<restart>`` in a SLURM job, whose
file system must support flock, as the locks of runs do. A rank refuses a folder that is not its
user's own or that others can enter. The leader removes the folder at the end; if a local leader is
killed, its workers do. Ranks of one machine listen on the loopback interface only.

**Trust.** The leader puts a random key into the folder. Ranks exchange tensors and JSON, never
pickles, and each JSON message has an HMAC under this key (`ProcessGroup.broadcast_json`), so only a
process that could read the folder can give an order. A rank that receives another message ends
with one line. Messages name classes by the names of the registry and never import one. The
traffic of gloo and NCCL is neither authenticated nor encrypted: whoever can reach their ports can
disturb a training or change tensors, but cannot give orders.

**Strategies** (``runtime=``). Both give the runs that one process gives.

    ddp      every rank trains all SAEs, each on whole stripes of every chunk, so on an equal share
             of every batch. Gradients and loss terms are averaged after each backward pass
             (`RunState.train`); only the leader writes. Results equal those of one process up to
             the order of sums.
    spread   each rank trains and records some of the SAEs (`divide_runs`). The ranks compute the
             chunks together, each a part, and exchange them. Results are bit-identical to those of
             one process.

**The order of exchanges** is the same on all ranks. A run that fails on one rank must therefore
fail on all, or all stop: with ddp, errors that need not occur on every rank end the group
(`RunState.catch_error`). A thread that exchanges beside the training thread, such as the prefetch,
has a channel of its own (`ProcessGroup.channel`).

**Signals.** Workers ignore SIGINT, which a terminal sends to all processes; the leader decides. On
SIGTERM, or if the leader stops, ranks that share batches end after the same step (the ranks agree
on it after each step), with spread each rank ends by itself and saves its own runs.

**Loss of a process.** The leader polls its workers while it waits (`ProcessGroup.check`) and raises
`ProcessLostError`. If memory ran out, the group is retried in halves by new processes; otherwise
its runs fail, and the same command continues from their checkpoints. A worker ends when its parent
process is gone. Tasks of a SLURM job are ended by SLURM.
"""
