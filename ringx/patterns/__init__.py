"""One file per communication pattern, and the registry of the algorithms that use them
(``registry.Pattern``: what a file holds)."""
