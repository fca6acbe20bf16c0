"""Public tools for authors of logs and storages: suites to subclass, faults to inject.

``log_suite`` and ``storage_suite`` are pytest classes: subclass one, supply its fixture, and every
promise of the contract becomes a test. ``machine`` plays random operations on two storages and on
a model. ``faults`` has a proxy that counts and cuts, counters of syncs and of exchanges, and a
clock that a test moves by hand. pytest and hypothesis are not installed with trialstore itself.
"""
