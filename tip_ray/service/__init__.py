"""Outside eyes: client, status API, page, report."""
