"""Grammars as token masks: what an answer must be, and which token may come next of it."""
