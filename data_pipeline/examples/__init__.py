"""Examples to tune a model on: conversations and comparisons as token ids and label masks, in the order of a run.

In: JSON, TSV or Parquet files in the forms that people have, a tokenizer, n_ctx. Out: `Example`s, `Preference`s or
prompts in memory (`read.py`, start here), labelled ones for GPT-1's tasks (`labelled.py`), and for each position of a
run the examples, or the packed row of tokens, labels and segment ids, that stand there (`rows.py`). `forms.py` says
what a record means, `templates.py` how its turns become ids, `collect.py` counts what gives no example.
"""
