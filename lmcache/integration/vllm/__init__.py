"""The plug-in for vLLM.

vLLM imports `lmcache_mp_connector`; a request then passes through `scheduler.py` (what is cached,
what is to be loaded and stored), `steps.py` (the plan of one step, sent to the worker) and
`worker.py` (the bytes), and reaches the server through `lmcache.client.kvcache`.
"""
