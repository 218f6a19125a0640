"""What routes are handed: the served models, the settings, shadow traffic, the caller's salt."""

from typing import Annotated

from fastapi import Depends, Request

from bitwatt.api.middleware import KEY_DIGEST
from bitwatt.errors import InvalidRequestError, shorten
from bitwatt.serving.models import Catalog
from bitwatt.serving.shadow import FIELD, Shadow
from bitwatt.settings import ServeSettings

__all__ = ["KeySalt", "MirrorWish", "Models", "SettingsOf", "ShadowOf"]


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


def _shadow(request: Request) -> Shadow:
    shadow: Shadow = request.app.state.shadow
    return shadow


ShadowOf = Annotated[Shadow, Depends(_shadow)]


def _mirror_wish(request: Request) -> bool | None:
    """Return what the caller's X-Bitwatt-Shadow says; None for not a word."""
    word = request.headers.get(FIELD)
    if word not in (None, "0", "1"):
        raise InvalidRequestError(f"{FIELD} is 0 or 1, not {shorten(word)}", param=FIELD)
    return None if word is None else word == "1"


MirrorWish = Annotated[bool | None, Depends(_mirror_wish)]
