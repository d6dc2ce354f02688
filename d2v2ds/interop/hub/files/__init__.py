"""Templates of the code that an export folder carries for transformers; `d2v2ds.interop.hub.write` copies them there.

They are ordinary modules of this package, so that they are linted and tested here; nothing of ours imports them.
"""
