"""Contexts that a server keeps: found by content, encoded once, evicted by use, kept on disk.

`store` is what requests and the engine thread talk to; `registry` holds the entries, `budget`
decides what has to go, `folder` keeps files, and `encoder` makes contexts with the engine. All but
`encoder` are plain logic: clock, encoder and folder are handed in.
"""
