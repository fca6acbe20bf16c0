-- The steps of a compaction, and of a trim. Each may run again when its answer was lost.
--
-- ARGV[1] names the step. A step that holds the journal to be what it was returns as exchange.lua
-- does; 'lost' says that the lock is another's by now, 'evicted' that the new record of this number
-- is not there any more. In each of these cases nothing was changed.
--
-- KEYS[1]  PREFIX:log_number
-- KEYS[2]  PREFIX:trialstore:compacting  token of who compacts
-- KEYS[3]  PREFIX:trialstore:stale       records up to this number were left by a compaction
-- KEYS[4]  PREFIX:trialstore:complete
-- KEYS[5]  PREFIX:trialstore:base        the snapshot that stands for trimmed records
-- KEYS[6]  PREFIX:snapshot               Optuna's, whose numbers are of the old journal
-- ARGV[2]  PREFIX:log:
-- ARGV[3]  PREFIX:trialstore:new:
-- ARGV[4]  the token
--
-- Source: docs/formats/redis.md, "Compaction".

local step, log, new, token = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

local function key_of(prefix, number)
  return prefix .. string.format('%d', number)
end

-- Calls work with the keys of many numbers at a time, which takes half as long as one by one. Lua's
-- stack, on which the arguments of a command are, ends at 8,000.
local function with_keys(prefix, first, last, work)
  for begin = first, last, 1000 do
    local keys = {}
    for number = begin, math.min(begin + 999, last) do
      keys[#keys + 1] = key_of(prefix, number)
    end
    work(keys, begin)
  end
end

local function remove(first, last)
  with_keys(log, first, last, function(keys)
    redis.call('UNLINK', unpack(keys))
  end)
end

-- What the caller has read is still there: the journal of that record 0, and the record before
-- the next one. Returns the number of the last record, or what differs.
local function check(next, tail, identity)
  if redis.call('GET', KEYS[2]) ~= token then
    return nil, {'lost', 0}
  end
  if redis.call('GETRANGE', key_of(log, 0), -#identity, -1) ~= identity then
    return nil, {'other', 0}
  end
  local last = tonumber(redis.call('GET', KEYS[1]) or '-1')
  if next > last + 1 then
    return nil, {'short', last}
  end
  if tail ~= '' and redis.call('GETRANGE', key_of(log, next - 1), -#tail, -1) ~= tail then
    return nil, {'changed', next - 1}
  end
  return last
end

-- put: ARGV[5] seconds that the lock lasts from now on, ARGV[6] number of the first record, the
-- records. Beside the journal.
if step == 'put' then
  if redis.call('GET', KEYS[2]) ~= token then
    return {'lost', 0}
  end
  redis.call('EXPIRE', KEYS[2], ARGV[5])
  for index = 7, #ARGV do
    redis.call('SET', key_of(new, ARGV[6] + index - 7), ARGV[index])
  end
  return {'ok', 0}
end

-- switch: ARGV[5] number of the next record, ARGV[6] the last bytes of the one before, ARGV[7]
-- those of record 0, ARGV[8] how many records may be left to move, ARGV[9] the new record 0,
-- ARGV[10] how many records the new journal has without those, ARGV[11] how many old records behind
-- it are removed at once.
if step == 'switch' then
  local next, n_new = tonumber(ARGV[5]), tonumber(ARGV[10])
  local last, differs = check(next, ARGV[6], ARGV[7])
  if not last then
    return differs
  end
  if last - next + 1 > tonumber(ARGV[8]) then
    return {'behind', last}
  end
  -- Nobody has read these since they were put, so a maxmemory policy evicts them before others.
  local evicted
  with_keys(new, 1, n_new - 1, function(keys, first)
    if not evicted and redis.call('EXISTS', unpack(keys)) < #keys then
      evicted = first
      while redis.call('EXISTS', key_of(new, evicted)) == 1 do
        evicted = evicted + 1
      end
    end
  end)
  if evicted then
    return {'evicted', evicted}
  end
  local moved = {}
  for number = next, last do
    local record = redis.call('GET', key_of(log, number))
    if not record then
      return {'hole', number}
    end
    moved[#moved + 1] = record
  end
  local stale = math.max(last, tonumber(redis.call('GET', KEYS[3]) or '-1'))
  -- From here on everything happens, or nothing: Redis logs the whole as one transaction, and does
  -- not undo it, so each command below must be one that can't fail.
  redis.call('SET', key_of(log, 0), ARGV[9])
  for number = 1, n_new - 1 do
    redis.call('RENAME', key_of(new, number), key_of(log, number))
  end
  for index, record in ipairs(moved) do
    redis.call('SET', key_of(log, n_new + index - 1), record)
  end
  local new_last = n_new + #moved - 1
  redis.call('SET', KEYS[1], string.format('%d', new_last))
  redis.call('SET', KEYS[4], string.format('%d', new_last))
  -- Plain Optuna workers may take a number first and set its record later: an old one there would
  -- be read meanwhile. So they are removed as far as anybody gets before the sweep has the rest.
  local clean = math.min(new_last + ARGV[11], stale)
  remove(new_last + 1, clean)
  if clean < stale then
    redis.call('SET', KEYS[3], string.format('%d', stale))
  else
    redis.call('DEL', KEYS[3])
  end
  redis.call('DEL', KEYS[5], KEYS[6])
  return {'ok', new_last}
end

-- sweep: ARGV[5] how many keys at most. Removes what the switch of a compaction, or of one that was
-- killed, left behind the last record, from the top. Returns whether there is more.
if step == 'sweep' then
  local stale = tonumber(redis.call('GET', KEYS[3]) or '-1')
  local last = tonumber(redis.call('GET', KEYS[1]) or '-1')
  local first = math.max(last + 1, stale - ARGV[5] + 1)
  remove(first, stale)
  if first > last + 1 then
    redis.call('SET', KEYS[3], string.format('%d', first - 1))
    return {'behind', first - 1}
  end
  redis.call('DEL', KEYS[3])
  return {'ok', 0}
end

-- trim: ARGV[5…7] as for switch, ARGV[9] the new record 1, ARGV[10] the snapshot.
if step == 'trim' then
  local last, differs = check(tonumber(ARGV[5]), ARGV[6], ARGV[7])
  if not last then
    return differs
  end
  redis.call('SET', KEYS[5], ARGV[10])
  redis.call('SET', key_of(log, 1), ARGV[9])
  return {'ok', 0}
end

-- drop: ARGV[5] the record 1 of a trimmed journal, ARGV[6] and ARGV[7] the first and last number
-- of the records to remove.
if step == 'drop' then
  if redis.call('GET', key_of(log, 1)) ~= ARGV[5] then
    return {'lost', 0}
  end
  remove(tonumber(ARGV[6]), tonumber(ARGV[7]))
  return {'ok', 0}
end
