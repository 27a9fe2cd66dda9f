"""Tasks: their descriptions (conf/task/, or a YAML file of a user), and the documents that these name.

In: a name and the folder of a task's files. Out: a `TaskConfig` and documents. Start with `description.py`.
"""
