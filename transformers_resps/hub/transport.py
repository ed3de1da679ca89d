"""The error of a broken connection, under the name it has in the installed `huggingface_hub`."""

try:
    from httpx2 import HTTPError as TransportError
except ImportError:  # huggingface_hub before it moved to httpx2
    from httpx import HTTPError as TransportError  # type: ignore[no-redef,import-not-found]


__all__ = ["TransportError"]
