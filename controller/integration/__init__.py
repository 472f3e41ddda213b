"""Headgate inside the application: what runs in gunicorn's and the application's own processes.

Standard library only, and nothing else of Headgate: `pip install --no-deps headgate` is enough there. (worker.py alone
needs what every uvicorn worker needs.) What these parts say reaches nginx by a header, and the daemon by its API.
"""
