"""Control groups, where Linux keeps the limits of a container, a service or a batch job."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

__all__ = ["group_folders"]

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def group_folders(controller: str) -> Iterator[Path]:
    """The folders of this process's groups and of all groups around them: the limits in each of them hold.

    `controller` is "cpu" or "memory", of version 1; in version 2 a group's one folder has the files of all. Inside a
    container the roots are its own group. Folders need not exist, nor have a file with a limit.
    """
    yield from (ROOT, ROOT / controller)
    with suppress(OSError):  # a system without control groups
        for line in MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            group = PurePosixPath(path.lstrip("/"))
            if ".." in group.parts or (controllers and controller not in controllers.split(",")):
                continue  # a group outside the container, or of another controller
            root = ROOT / controller if controllers else ROOT
            yield from (root / folder for folder in (group, *group.parents) if folder.parts)
