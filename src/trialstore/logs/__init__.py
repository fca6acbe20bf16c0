"""Rooms for logs; none of them knows another."""
