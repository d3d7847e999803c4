"""The server: `app.py` builds it, `zmq_frontend.py` runs the owner thread, `service.py` answers each request."""
