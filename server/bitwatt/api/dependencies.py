"""What routes are handed: the served models, the settings, shadow traffic, the caller's salt.

And what they ask of a body: which of its fields nothing is made of. What routes depend on are
coroutine functions: FastAPI runs any other in a thread, for which each request would wait.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Annotated
from urllib.parse import quote

from fastapi import Depends, Request

from bitwatt.api.energy_forms import ENERGY_FIELD
from bitwatt.api.kept_items import CallerItems, KeptItems
from bitwatt.api.key_limits import KeyLimits
from bitwatt.api.middleware import KEY_DIGEST
from bitwatt.api.schemas.common import Body
from bitwatt.errors import InvalidRequestError, shorten
from bitwatt.serving.generation import Generation
from bitwatt.serving.models import Catalog
from bitwatt.serving.remote_twin import RemoteTwin
from bitwatt.serving.shadow import FIELD, Shadow
from bitwatt.settings import ServeSettings
from bitwatt.telemetry.declarations import IGNORED_FIELDS
from bitwatt.telemetry.metrics import Metrics

__all__ = [
    "IGNORED_FIELDS_HEADER",
    "ChargeOf",
    "KeptItemsOf",
    "KeySalt",
    "MirrorWish",
    "Models",
    "SettingsOf",
    "ShadowOf",
    "TwinOf",
    "WantsEnergy",
    "name_ignored_fields",
    "refuse_priority",
]

IGNORED_FIELDS_HEADER = "X-Bitwatt-Ignored-Fields"
_MAX_NAMED = 16
Charge = Callable[[Generation], AbstractContextManager[None]]
_MAX_NAME_CHARS = 64


async def _catalog(request: Request) -> Catalog:
    catalog: Catalog = request.app.state.catalog
    return catalog


Models = Annotated[Catalog, Depends(_catalog)]


async def _settings(request: Request) -> ServeSettings:
    settings: ServeSettings = request.app.state.settings
    return settings


SettingsOf = Annotated[ServeSettings, Depends(_settings)]


async def _key_salt(request: Request, settings: SettingsOf) -> str:
    digest: bytes | None = request.scope.get(KEY_DIGEST)
    return digest.hex() if digest is not None and settings.cache_per_key else ""


KeySalt = Annotated[str, Depends(_key_salt)]


async def _kept_items(request: Request) -> CallerItems:
    kept: KeptItems = request.app.state.kept_items
    return kept.of(request.scope.get(KEY_DIGEST))


KeptItemsOf = Annotated[CallerItems, Depends(_kept_items)]
"""The items of the caller's earlier responses."""


async def _shadow(request: Request) -> Shadow:
    shadow: Shadow = request.app.state.shadow
    return shadow


ShadowOf = Annotated[Shadow, Depends(_shadow)]


async def _twin(request: Request) -> RemoteTwin | None:
    twin: RemoteTwin | None = request.app.state.twin
    return twin


TwinOf = Annotated[RemoteTwin | None, Depends(_twin)]
"""The twin that another server has; None where the settings name none."""


def _yes_or_no(request: Request, field: str) -> bool | None:
    """Return what a header of the caller's says; None for not a word."""
    word = request.headers.get(field)
    if word not in (None, "0", "1"):
        raise InvalidRequestError(f"{field} is 0 or 1, not {shorten(word)}", param=field)
    return None if word is None else word == "1"


async def _mirror_wish(request: Request) -> bool | None:
    return _yes_or_no(request, FIELD)


MirrorWish = Annotated[bool | None, Depends(_mirror_wish)]


async def _wants_energy(request: Request, settings: SettingsOf) -> bool:
    wish = _yes_or_no(request, ENERGY_FIELD)
    return settings.energy_fields if wish is None else wish


WantsEnergy = Annotated[bool, Depends(_wants_energy)]
"""Whether the answer is to have energy and cost in the forms of energy_forms, too."""


async def _charge(request: Request) -> Charge:
    limits: KeyLimits = request.app.state.key_limits
    return partial(limits.charging, request.scope.get(KEY_DIGEST))


ChargeOf = Annotated[Charge, Depends(_charge)]
"""Has the caller's key pay for what a generation uses while the block runs."""


def refuse_priority(priority: int | None, settings: ServeSettings) -> None:
    """Raise InvalidRequestError where a caller gives one and the settings don't let it."""
    if priority and not settings.allow_priority:
        raise InvalidRequestError(
            f"priority is {priority}; it is not taken from callers here (--allow-priority)",
            param="priority",
        )


def name_ignored_fields(request: Request, body: Body) -> dict[str, str]:
    """Return the header that names the fields that no API known here defines, and count them.

    The header has 16 names at most, of 64 characters each, and how many more there are; what isn't
    a letter, a digit or one of `.[]_-~` is percent-encoded.

    Raises  InvalidRequestError where --strict-fields is set
    """
    unknown = body.unknown_fields
    if not unknown:
        return {}
    names = [
        quote(name[:_MAX_NAME_CHARS], safe="[]", errors="replace")[:_MAX_NAME_CHARS]
        for name in unknown[:_MAX_NAMED]
    ]
    settings: ServeSettings = request.app.state.settings
    if settings.strict_fields:
        raise InvalidRequestError(
            f"unknown field {shorten(unknown[0])} (--strict-fields)", param=names[0]
        )
    metrics: Metrics = request.app.state.metrics
    metrics[IGNORED_FIELDS].labels(request.scope["route"].path).inc(len(unknown))
    if len(unknown) > _MAX_NAMED:
        names.append(f"and {len(unknown) - _MAX_NAMED} more")
    return {IGNORED_FIELDS_HEADER: ", ".join(names)}
