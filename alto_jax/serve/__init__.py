"""The HTTP service: requests from many people, batched onto a few compiled programs; see __main__.py, docs/serve.md."""
