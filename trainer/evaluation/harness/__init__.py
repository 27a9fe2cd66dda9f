"""lm-evaluation-harness over our models: its tasks, prompts and figures. The package that imports lm_eval.

In: names of its tasks and a `Scoring`. Out: an `Outcome` of each. Start with `run.py`.
`python -m trainer.evaluation.harness --model gradus --model_args checkpoint=RUN --tasks piqa` is its own command line,
which knows our models under that name.
"""
