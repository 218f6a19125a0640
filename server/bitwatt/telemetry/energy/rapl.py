"""The CPU packages' energy counters (RAPL, Intel and AMD), through Linux's powercap."""

from dataclasses import dataclass
from pathlib import Path

from bitwatt.telemetry.energy.counter import DeviceState, SourceName, Unavailable

__all__ = ["RaplCounter"]

_POWERCAP = Path("/sys/class/powercap")


@dataclass(slots=True)
class _Zone:
    """One counter of microjoules; it begins anew after range_uj."""

    name: str
    path: Path
    range_uj: int
    last_uj: int

    def advance(self) -> int:
        """Return microjoules since the last call. Called before the counter can go round twice."""
        now_uj = _number(self.path / "energy_uj")
        delta_uj = now_uj - self.last_uj
        self.last_uj = now_uj
        return delta_uj if delta_uj >= 0 else delta_uj + self.range_uj


class RaplCounter:
    """Joules of all CPU packages, and of their memory where it is counted apart.

    Only zones that don't contain each other are summed: `package-N` holds its cores and graphics,
    `dram` lies outside it, and `psys` would hold them all. Whatever else runs on the CPUs is in.
    """

    source: SourceName = "rapl"
    poll_s = 0.1

    def __init__(self, zones: list[_Zone]) -> None:
        self._zones = zones
        self._total_uj = 0
        self.device = "+".join(zone.name for zone in zones)

    @classmethod
    def open(cls, root: Path | None = None) -> "RaplCounter | Unavailable":
        """Return the counter, or why it can't be read."""
        root = root or _POWERCAP
        try:
            zones = [_open_zone(path) for path in _disjoint_zones(root)]
        except PermissionError as error:
            return Unavailable(
                "not_readable", f"{error.filename} is not readable by this user; root may read it"
            )
        except (OSError, ValueError) as error:
            return Unavailable("not_readable", f"{root}: {error}")
        if not zones:
            return Unavailable(
                "no_powercap",
                f"{root} has no CPU package's counter, as in most virtual machines and containers",
            )
        return cls(zones)

    def read_joules(self) -> float | None:
        """Return joules since the counter was opened; None where a zone can't be read."""
        try:
            self._total_uj += sum(zone.advance() for zone in self._zones)
        except (OSError, ValueError):
            return None
        return self._total_uj / 1e6

    def state(self) -> DeviceState | None:
        return None

    def close(self) -> None:
        pass


def _disjoint_zones(root: Path) -> list[Path]:
    """Return packages and their memory. `intel-rapl-mmio` shows the same packages once more."""
    zones: list[Path] = []
    for package in sorted(root.glob("intel-rapl:*")):
        if package.name.count(":") != 1 or not _name(package).startswith("package"):
            continue
        zones.append(package)
        zones += [zone for zone in sorted(root.glob(f"{package.name}:*")) if _name(zone) == "dram"]
    return zones


def _open_zone(path: Path) -> _Zone:
    parent = path.name.split(":")[1]
    name = _name(path)
    return _Zone(
        name=name if name.startswith("package") else f"{name}-{parent}",
        path=path,
        range_uj=_number(path / "max_energy_range_uj"),
        last_uj=_number(path / "energy_uj"),
    )


def _name(zone: Path) -> str:
    return (zone / "name").read_text(encoding="ascii").strip()


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
