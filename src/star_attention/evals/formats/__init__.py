"""Data sets from and to files: our own records, and published formats.

    format          fields of a line                                   read           written
    samples         context, query, answers, and those of `Sample`     jsonl          jsonl
    star-attention  index, input_context, input_query, outputs/output  jsonl          jsonl
    kvpress         context, question, answer_prefix, answer,
                    max_new_tokens, task                               jsonl, csv, parquet (both)
    ruler           index, input, outputs, (answer_prefix)             jsonl          jsonl
    babilong        input, question, target                            jsonl, csv
    infinitebench   id, context, input, answer, options                jsonl
    scbench         id, context, multi_turns                           jsonl
    questions       context, query and answers by their usual names    jsonl, csv

A .json file holds the lines as a list; parquet needs pyarrow. Published formats are
written with our remaining fields next to theirs, which other readers ignore, so that reading the
file gives the same samples again. In files that others wrote, missing fields are derived:

- task: the field `task`, else the name of the file; for names of splits and shards
  (`niah_single_1/validation.jsonl` as in RULER, `test-00000-of-00001.parquet`) the name of the
  folder. For BABILong the `qa1` in the name of the file, or the closest folder `qa1`.
- metric: that of the task for babilong, infinitebench and scbench. For star-attention and ruler,
  string_match_part if the task begins with "qa", else string_match_all, except for the names of
  BABILong's and InfiniteBench's tasks. For kvpress the same, but unknown tasks are refused, because
  its data sets have many other metrics.
- max_new_tokens: that of the task, as published; 128 for unknown tasks.
- length: the size that the file or the closest folder is named after (`4096`, `16k`).
- id: the task, the folder's size if there is one, and the line's `id` or `index`, else the number
  of lines before it.
"""
