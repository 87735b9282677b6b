"""Configuration without its secrets: what may leave the machine."""

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "***"

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET_ANYWHERE = {
    "password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "authorization",
}  # fmt: skip
_SECRET_AT_THE_END = re.compile(r".*(key|token)s?|auth|bearer|cookies?|pat")
_HARMLESS_BEFORE = {
    "bos", "eos", "pad", "unk", "sep", "cls", "mask", "image", "video", "audio", "vision", "text", "prompt", "label",
    "special", "stop", "start", "end", "begin", "num", "max", "min", "sort", "column", "new", "extra", "added",
    "messages", "images", "videos", "audios",
}  # fmt: skip
_USER_INFO = re.compile(r"(?<=://)[^/\s?#]+@")
_SIGNATURE = re.compile(r"([?&][\w-]*(?:key|token|secret|password|signature|sig|credential)=)[^&#\s]+", re.IGNORECASE)


def redact(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy in which secrets are replaced by ``***``.

    Secrets are strings under a key that names one (``api_key``, ``hf_token``, ``password``; not ``pad_token``), and
    the user information and signed parameters of URLs anywhere (``https://user:password@host/?token=...``).
    """
    found: dict[str, Any] = _redact(config, secret=False)
    return found


def _redact(value: Any, *, secret: bool) -> Any:
    if isinstance(value, Mapping):
        return {key: _redact(item, secret=secret or _names_a_secret(str(key))) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redact(item, secret=secret) for item in value]
    if isinstance(value, str):
        return REDACTED if secret and value else _SIGNATURE.sub(rf"\1{REDACTED}", _USER_INFO.sub(f"{REDACTED}@", value))
    return value


def _names_a_secret(key: str) -> bool:
    words = [word.lower() for word in _WORDS.findall(key)]
    if _SECRET_ANYWHERE.intersection(words):
        return True
    if not words or _HARMLESS_BEFORE.intersection(words[:-1]):
        return False
    return _SECRET_AT_THE_END.fullmatch(words[-1]) is not None
