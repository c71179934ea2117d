"""Samples: the record, its size in tokens, the texts and the parts that it is built from."""
