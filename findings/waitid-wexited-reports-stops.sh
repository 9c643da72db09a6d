#!/bin/sh
# waitid(2) with WEXITED alone reports the stops of a child that made its parent the tracer.
#
# Guess:  waitid(P_ALL, 0, WEXITED) returns only ends (CLD_EXITED, CLD_KILLED, CLD_DUMPED): waitid(2) lists WSTOPPED as
#         the flag for children that have stopped.
# Seen:   Linux 6.18: si_code is CLD_TRAPPED (4). A child needs no right for that: PTRACE_TRACEME is enough.
#         Without WSTOPPED only the stops of untraced children are left out.
# Why it matters: a supervisor that reaps whatever it is given takes a process that lives for one that has ended, and
#         forgets it, or sends its exit status. Look at si_code before you believe that a child is gone.
# Output on Linux 6.18: "si_code 4 (CLD_TRAPPED), child alive: True", then "si_code 1 (CLD_EXITED), status 7".
set -eu
python3 - <<'PYTHON'
import ctypes, os, signal

libc = ctypes.CDLL(None, use_errno=True)
TRACEME, CONT = 0, 7
NAMES = {1: "CLD_EXITED", 2: "CLD_KILLED", 3: "CLD_DUMPED", 4: "CLD_TRAPPED", 5: "CLD_STOPPED"}

child = os.fork()
if child == 0:
    libc.ptrace(TRACEME, 0, None, None)
    os.kill(os.getpid(), signal.SIGUSR1)
    os._exit(7)
first = os.waitid(os.P_ALL, 0, os.WEXITED)
with open(f"/proc/{child}/stat") as stat:
    alive = stat.read().rpartition(")")[2].split()[0] != "Z"
print(f"si_code {first.si_code} ({NAMES[first.si_code]}), child alive: {alive}")
libc.ptrace(CONT, child, None, 0)
last = os.waitid(os.P_PID, child, os.WEXITED)
print(f"si_code {last.si_code} ({NAMES[last.si_code]}), status {last.si_status}")
assert (first.si_code, alive, last.si_code, last.si_status) == (4, True, 1, 7), "the behaviour has changed"
PYTHON
echo PASS
