"""Who checks: the audit of what a policy did, its metrics and its report."""
