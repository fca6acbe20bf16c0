-- One exchange with a journal: append what is not there yet, and return what is new.
--
-- Redis runs a script alone, and writes what it did to its append-only file as one transaction:
-- a crash leaves all of it or nothing. Every check comes before the first write, and the first
-- write is one that Redis refuses when memory is short, so an error leaves nothing either.
--
-- KEYS[1]  PREFIX:log_number            number of the last record
-- KEYS[2]  PREFIX:trialstore:complete   every record up to this number has been written
-- KEYS[3]  PREFIX:trialstore:leases     when each owner last said that it lives
-- KEYS[4]  PREFIX:trialstore:stale      records up to this number were left by a compaction
-- KEYS[5]  PREFIX:trialstore:turn       whose conditional append comes next; ends by itself
-- ARGV[1]  PREFIX:log:                  a record's key without its number
-- ARGV[2]  number of the next record that the caller has not read
-- ARGV[3]  the last bytes of the record before that one; empty if not known
-- ARGV[4]  the last bytes of record 0, which name the journal; empty if not known
-- ARGV[5]  how many records may be returned
-- ARGV[6]  who appends only if nothing is new; empty: append in any case
-- ARGV[7]  how many owners create or claim a trial by this, whose leases are renewed with it
-- ARGV[8…] those owners, then the records to append
--
-- Returns one string, which costs a client less to read than a list: "STATUS NUMBER COUNT", and
-- then COUNT records, a newline before each:
--   ok       number of the last record, the records before the appended ones
--   moved    number of the last record, the records that are new, for which nothing was appended;
--            the caller has the turn now
--   turn     number of the last record; somebody else has the turn, nothing was appended
--   behind   number of the last record; more are new than may be returned, nothing was appended
--   part     number of the last record, the first of the new records, which are too long to be returned
--            together; nothing was appended
--   other    0, this is not the journal that record 0 belonged to
--   hole     number of a record that is not there (yet), nothing was appended
--   short    number of the last record, which is before the one the caller has read
--   changed  number of the record that does not end with the given bytes
--   beyond   number of a record after the last one, which is there, or was
--   number   0, what PREFIX:log_number holds instead of a number
--
-- Source: docs/formats/redis.md.

local format = string.format
-- Bytes of records in an answer, to which ten more records may come.
local LENGTH_MAX = 2 ^ 24

local function key_of(number)
  return ARGV[1] .. format('%d', number)
end

local function answer(status, number, records)
  records = records or {}
  -- In front of them, and not before the whole with "..", which would copy the whole once more:
  -- a fifth of what an answer of 30 records takes.
  records[0] = format('%s %d %d', status, number, #records)
  return table.concat(records, '\n', 0)
end

local stored = redis.call('GET', KEYS[1])
local last = tonumber(stored or '-1')
-- What Lua takes for a number besides: '1e3', 'inf', and what no double counts to.
if not last or not (stored or '-1'):find('^-?%d+$') or last < -1 or last > 2 ^ 53 then
  return answer('number', 0, {(stored:gsub('\n', ' '))})
end
if ARGV[4] ~= '' and redis.call('GETRANGE', key_of(0), -#ARGV[4], -1) ~= ARGV[4] then
  return answer('other', 0)
end
local next = tonumber(ARGV[2])
if next > last + 1 then
  return answer('short', last)
end
-- Whoever sets complete sets the number with it, or before.
local complete = tonumber(redis.call('GET', KEYS[2]) or '') or -1
if complete > last then
  return answer('beyond', complete)
end
-- What a compaction left is passed over. It set both keys; without the one, the number may be lost
-- too, and what seems to be left be the journal.
if redis.call('EXISTS', key_of(last + 1)) == 1
    and (complete < 0 or last + 1 > tonumber(redis.call('GET', KEYS[4]) or '-1')) then
  return answer('beyond', last + 1)
end
local tail = ARGV[3]
if tail ~= '' and redis.call('GETRANGE', key_of(next - 1), -#tail, -1) ~= tail then
  return answer('changed', next - 1)
end
if last - next + 1 > tonumber(ARGV[5]) then
  return answer('behind', last)
end

-- An answer is in the server's memory three times, and nobody else is served while it is made.
local news, length = {}, 0
for begin = next, last, 10 do
  if length > LENGTH_MAX then
    return answer('part', last, news)
  end
  local keys = {}
  for number = begin, math.min(begin + 9, last) do
    keys[#keys + 1] = key_of(number)
  end
  for index, record in ipairs(redis.call('MGET', unpack(keys))) do
    if not record then
      return answer('hole', begin + index - 1)
    end
    news[#news + 1] = record
    length = length + #record
  end
end

local first = 8 + tonumber(ARGV[7])
if #ARGV >= first then
  -- A record carries its writer and its place in that writer's sequence, so no two are equal. One
  -- that is among the news was appended by an attempt whose answer was lost, and attempts that
  -- arrive late find the records of those that overtook them.
  local known = {}
  for _, record in ipairs(news) do
    known[record] = true
  end
  local fresh = {}
  for index = first, #ARGV do
    if not known[ARGV[index]] then
      fresh[#fresh + 1] = ARGV[index]
    end
  end
  if #fresh > 0 then
    local turn = redis.call('GET', KEYS[5])
    if turn and turn ~= ARGV[6] then
      return answer('turn', last)
    end
    if ARGV[6] ~= '' and #news > 0 then
      -- While the caller decides anew, others wait: it would never come through a crowd of them.
      redis.call('SET', KEYS[5], ARGV[6], 'PX', 1000)
      return answer('moved', last, news)
    end
    -- The leases before the records: if that key holds something else, nothing has been written yet.
    if first > 8 then
      local time = redis.call('TIME')
      local now_ms = format('%d', time[1] * 1000 + math.floor(time[2] / 1000))
      for index = 8, first - 1 do
        redis.call('HSET', KEYS[3], ARGV[index], now_ms)
      end
    end
    -- One command for all, or for each so many: Lua's stack ends at 8,000.
    local new_last = format('%d', last + #fresh)
    local writes = {KEYS[1], new_last, KEYS[2], new_last}
    for index, record in ipairs(fresh) do
      writes[#writes + 1] = key_of(last + index)
      writes[#writes + 1] = record
      if #writes >= 4000 or index == #fresh then
        redis.call('MSET', unpack(writes))
        writes = {}
      end
    end
    last = last + #fresh
    if turn then
      redis.call('DEL', KEYS[5])
    end
  end
end
return answer('ok', last, news)
