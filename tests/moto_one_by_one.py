"""moto's S3 server, which handles one request at a time: two that write one key at once may get a 500 from it.

Run: python tests/moto_one_by_one.py [MOTO'S FLAGS]
"""

import io
import threading

import moto.server

_lock = threading.Lock()
_run_simple = moto.server.run_simple


def run_one_by_one(host, port, app, **options):
    """Serve `app`; bodies are read before anybody has to wait."""

    def locked(environ, start_response):
        if length := environ.get("CONTENT_LENGTH"):
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(int(length)))
        with _lock:
            answer = app(environ, start_response)
            try:
                return list(answer)
            finally:
                if hasattr(answer, "close"):
                    answer.close()

    _run_simple(host, port, locked, **options)


if __name__ == "__main__":
    moto.server.run_simple = run_one_by_one
    moto.server.main()
