"""What is at a path where a model should be. No torch."""

import stat
from pathlib import Path

__all__ = ["why_no_folder", "why_no_model"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def why_no_folder(path: Path) -> str | None:
    """Return why a path is no folder that holds something, nor a GGUF file; None where it is."""
    try:
        mode = path.stat().st_mode
        if path.suffix.lower() == ".gguf" and stat.S_ISREG(mode):
            return None
        if stat.S_ISDIR(mode):
            if not any(path.iterdir()):
                return "is an empty folder"
            (path / "config.json").exists()  # raises where the folder may be listed but not read
            return None
    except FileNotFoundError:
        is_repository = not path.is_absolute() and len(path.parts) == 2 and ".." not in path.parts
        hint = "; a model of Hugging Face's hub is downloaded first, with `hf download`"
        return f"is not a folder: it does not exist{hint if is_repository else ''}"
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        return f"can't be read: {cause}"
    return "is not a folder but a file: give the folder that holds config.json, or a .gguf file"


def why_no_model(path: Path) -> str:
    """Return what a folder lacks that holds no model."""
    names = sorted(entry.name for entry in path.iterdir())
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        return f"has its weights as GGUF: give the file itself, {ggufs[0]}"
    if "config.json" not in names:
        return "has no config.json"
    for name in names:
        if name.endswith(_PICKLES):
            return f"has its weights as pickles ({name}), which are not read: convert them"
    return "has no weights"
