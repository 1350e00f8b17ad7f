"""A sandbox for programs that a policy wrote, and a grader of what they return that they cannot fool.

Every verdict gets a bubblewrap sandbox of its own: fresh user, process, network, IPC and host-name namespaces, a
read-only root that holds the Python interpreter and the system's libraries and nothing of the user's, a small tmpfs, no
``/proc``, no environment, resource limits. It is killed when the verdict is reached or its time is over.

One sandbox per verdict, and no fork server that outlives it: children of a server share a user, so one could signal,
trace or starve the next; and what a sandbox costs (two processes, some 10 ms beside the interpreter's own start) leaves
the grader well above its target (`vgr bench grader`).

The verdict is reached in the parent. The program gets the inputs, one after another, and never an expected value; what
comes back is data, decoded strictly and compared here. Whoever forges the answer has to know it.
"""

from verl_grad_routing.envs.sandbox.launch import Launcher, SandboxError
from verl_grad_routing.envs.sandbox.limits import Limits
from verl_grad_routing.envs.sandbox.pool import Pool, check, cores
from verl_grad_routing.envs.sandbox.process import Completed, run
from verl_grad_routing.envs.sandbox.strict import Call, Report, Task, grade
from verl_grad_routing.envs.sandbox.values import decode, same

__all__ = [
    "Call",
    "Completed",
    "Launcher",
    "Limits",
    "Pool",
    "Report",
    "SandboxError",
    "Task",
    "check",
    "cores",
    "decode",
    "grade",
    "run",
    "same",
]
