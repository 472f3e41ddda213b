"""tests.support.apps behind the middlewares."""

from __future__ import annotations

from controller.integration.asgi import Offline as AsgiOffline
from controller.integration.wsgi import Offline as WsgiOffline
from tests.support import apps

asgi = AsgiOffline(apps.asgi)
wsgi = WsgiOffline(apps.wsgi)
