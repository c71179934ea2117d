"""Continuous batching: answers that share decode forwards, and come and go between them.

`batch` has the public objects, `scheduler` what runs next, `cohort` the rows that share forwards,
`prefill` the first forward of a row, `task` and `answer` one row.
"""
