"""What this process holds, by its own system's account."""

from pathlib import Path

__all__ = ["rss_anon_bytes"]


def rss_anon_bytes() -> int | None:
    """Return this process's anonymous resident memory, or None where the system doesn't tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return None
