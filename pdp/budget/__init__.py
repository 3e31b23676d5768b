"""Budgets: may it still be spent?"""
