"""The device's part of an update: trust, fetch, stage, gate, try, confirm, roll back. See docs/update.md."""
