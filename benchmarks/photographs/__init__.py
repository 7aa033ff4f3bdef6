"""Our trainer on photographs against its peers; see __main__.py."""
