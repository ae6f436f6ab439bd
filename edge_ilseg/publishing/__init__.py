"""The publisher's part of an update: keys, the repository, packs and releases. See docs/update.md."""
