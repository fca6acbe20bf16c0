"""One script for each version; the name of a script is its version's."""
