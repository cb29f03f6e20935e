"""Numbers to tables, charts and pages"""
