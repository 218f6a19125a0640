"""What tokens cost to rent the machine for."""

__all__ = ["usd_of_rent_per_million_tokens"]


def usd_of_rent_per_million_tokens(usd_per_hour: float | None, tokens_per_s: float) -> float | None:
    """Return US dollars per million output tokens; None without a price or without tokens.

    tokens_per_s  over wall-clock time: a machine is paid for while it waits
    """
    if usd_per_hour is None or tokens_per_s <= 0:
        return None
    return usd_per_hour / (tokens_per_s * 3600) * 1e6
