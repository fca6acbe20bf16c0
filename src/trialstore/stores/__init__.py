"""Looking after whole stores: describe, check, repair, copy, export and measure them.

What the command line does is done here; ``cli/`` only parses, opens, calls and prints. Nothing of
this is imported by a storage.
"""
