"""gunicorn's worker for ASGI applications. It needs uvicorn-worker, or a uvicorn that still has uvicorn.workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:

    class _Base:
        config: Any
        cfg: Any

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

else:
    try:
        from uvicorn_worker import UvicornWorker as _Base
    except ModuleNotFoundError:
        from uvicorn.workers import UvicornWorker as _Base


class UvicornWorker(_Base):
    """uvicorn's worker, with gunicorn's `graceful_timeout` handed on to uvicorn.

    Without that uvicorn waits for its requests without limit, and gunicorn kills it in the middle of them. uvicorn
    gives up a second earlier than gunicorn kills, so that it is uvicorn that ends what is left.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config.timeout_graceful_shutdown = max(1, self.cfg.graceful_timeout - 1)
