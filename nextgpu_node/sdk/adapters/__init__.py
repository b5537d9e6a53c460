"""Thin adapters: other libraries' schedulers, with the Executor below them.  docs/executor.md"""
