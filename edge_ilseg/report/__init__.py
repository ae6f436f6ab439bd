"""Pages for people: one self-contained HTML file a report. Needs the extra `report`."""
