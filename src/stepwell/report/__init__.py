"""What a run tells: `result.json`, the table, the report with its plots, and the words for numbers."""
