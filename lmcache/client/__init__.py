"""The client side: `mq.py` sends messages, `kvcache.py` stores and retrieves chunks with them."""
