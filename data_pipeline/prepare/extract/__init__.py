"""Text of an HTML page, within limits of time and memory that a hostile page cannot pass.

In: HTML. Out: text, or a reason. Start with `step.py`.
"""
