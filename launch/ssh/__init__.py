"""Runs on hosts reached over ssh.

In: a `Job` and a list of hosts. Out: ranks on each, ended with their connection. Start with `launcher.py`.
"""
