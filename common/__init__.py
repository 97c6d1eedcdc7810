"""What a script needs around its algorithm.

Options, checkpoints, runs, logs, batches, files and errors, and what they expect of a script.
"""
