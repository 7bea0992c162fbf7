"""Bytes on the wire <-> nouns: frames, fragments and activation codecs. Pure functions over numpy, no torch, no I/O."""
