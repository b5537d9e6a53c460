"""Searches what a machine leaves of a marked text: files, memory, descriptors, shared memory."""
