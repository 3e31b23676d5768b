"""Authorize: what does the policy say?"""
