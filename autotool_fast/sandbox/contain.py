"""What the kernel is asked for: limits, namespaces, and the end of a whole family of processes.

Stands alone (the standard library only): `worker` loads it by its path, isolated from the trainer's own modules.

Namespaces are best effort, because containers and some distributions forbid them; `worker` tells the trainer whether
the network is closed. Without them the same calls still give limits, and an end to every descendant that can be found.
"""

import contextlib
import ctypes
import os
import resource
import signal
import struct
import time

NEW_MOUNTS, NEW_USER, NEW_PID, NEW_NET = 0x20000, 0x10000000, 0x20000000, 0x40000000
NOBODY, FIRST_USER = 65534, 0x70000000
_PARENT_DEATH, _DUMPABLE, _KEEP_CAPABILITIES, _SUBREAPER, _NO_NEW_PRIVILEGES = 1, 4, 8, 36, 38
_AMBIENT, _AMBIENT_RAISE = 47, 2
_CAPABILITIES_3, _READ = 0x20080522, 1 << 2  # version of the call's form; CAP_DAC_READ_SEARCH
_NO_SUID, _NO_DEVICES, _NO_EXEC, _RECURSIVE, _PRIVATE = 2, 4, 8, 1 << 14, 1 << 18
_LIBC = ctypes.CDLL(None, use_errno=True)


def adopt_orphans():
    """Become the parent of every descendant whose own parent dies."""
    _LIBC.prctl(_SUBREAPER, 1, 0, 0, 0)


def leave(flags):
    """Leave namespaces for new ones, staying the same user; returns whether it was allowed."""
    user, group = os.geteuid(), os.getegid()
    if _LIBC.unshare(flags) != 0:
        return False
    if flags & NEW_USER:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{user} {user} 1")
        _write("/proc/self/gid_map", f"{group} {group} 1")
    return True


def _write(path, text):
    with contextlib.suppress(OSError), open(path, "w") as file:
        file.write(text)


def limit(limits):
    """Set the limits of this process and of all that it starts."""
    allowed = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: limits["cpu_s"],
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_NPROC: limits["processes"],
    }
    for kind, value in allowed.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def tasks_of(user):
    """How many threads a user has, in processes that can be seen: a limit of processes counts all of them."""
    count = 0
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and os.stat(f"/proc/{entry}").st_uid == user:
                count += len(os.listdir(f"/proc/{entry}/task"))
        except OSError:
            continue
    return count


def hide_processes():
    """Show in /proc the processes of this process namespace alone, with their environments; best effort."""
    if leave(NEW_MOUNTS):
        _LIBC.mount(b"none", b"/", None, _PRIVATE | _RECURSIVE, None)
        _LIBC.mount(b"proc", b"/proc", b"proc", _NO_SUID | _NO_DEVICES | _NO_EXEC, None)


def session_user(number):
    """A user for a session of root: (its id, whether no one else has it). `number` tells sessions apart."""
    own = FIRST_USER + number
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    known = any(first <= own < first + count for first, _, count in ranges)
    return (own, True) if known else (NOBODY, False)


def become(user):
    """Become another user, who may read what root may, such as the interpreter's modules, but write nothing of it.

    Root itself is above the limit of processes, and may write everywhere.
    """
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    _LIBC.prctl(_KEEP_CAPABILITIES, 1, 0, 0, 0)
    os.setresuid(user, user, user)
    _LIBC.capset(struct.pack("=Ii", _CAPABILITIES_3, 0), struct.pack("=6I", _READ, _READ, _READ, 0, 0, 0))
    _LIBC.prctl(_AMBIENT, _AMBIENT_RAISE, _READ.bit_length() - 1, 0, 0)  # also for programs that it starts
    _LIBC.prctl(_DUMPABLE, 1, 0, 0, 0)  # else /proc/self stays root's


def die_with_parent():
    """Be killed when the parent dies, and gain no rights by running another program. Undone by a change of user."""
    _LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _LIBC.prctl(_PARENT_DEATH, signal.SIGKILL, 0, 0, 0)


def children():
    """Processes whose parent is this one."""
    mine, found = os.getpid(), []
    with contextlib.suppress(OSError), open(f"/proc/self/task/{mine}/children") as file:
        return [int(number) for number in file.read().split()]
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:
                fields = file.read().rpartition(b") ")[2].split()
        except OSError:
            continue
        if int(fields[1]) == mine:
            found.append(int(entry))
    return found


def end_family(leader, patience_s=5.0):
    """Kill `leader`, its process group and whatever else descends from this process, and wait until they are gone.

    In a process namespace of its own the kernel kills all with the leader. Else descendants become children of this
    process one generation at a time (see `adopt_orphans`) and are killed as they do.
    """
    end = time.monotonic() + patience_s
    gone = False
    _kill(leader)
    while time.monotonic() < end:
        _kill(-leader)
        try:
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                gone |= pid == leader
        except ChildProcessError:
            _kill(-leader)
            return
        if gone:
            for child in children():
                _kill(child)
        time.sleep(0.001)


def end_strays(patience_s=1.0):
    """Kill whatever descends from this process, one generation at a time, and wait until it is gone."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        for child in children():
            _kill(child)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def _kill(number):
    with contextlib.suppress(OSError):
        os.kill(number, signal.SIGKILL)
